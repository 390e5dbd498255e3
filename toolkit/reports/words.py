"""Shares, threat models and tables in words, as all reports write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolkit.reports.schema import Share, Threat


def percent(share: Share) -> str:
    """A share with its interval and count."""
    return f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}] (n={share.total})"


def threat_text(threat: Threat) -> str:
    """The threat model in words."""
    norm = "l-inf" if threat.norm == "linf" else threat.norm
    space = "pixels in [0, 1]" if threat.space == "pixels" else "the normalised space"
    clip = "clipped to valid pixels" if threat.clip else "not clipped to valid pixels"
    return f"{norm}, eps {threat.eps:.4g} in {space}, {clip} (preset `{threat.preset}`)"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
