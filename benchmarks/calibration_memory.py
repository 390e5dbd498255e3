"""Memory that calibration takes with few and with many images: a process of its own for each.

    python benchmarks/calibration_memory.py [--counts 256,8192] [--methods minmax,mse] [--data fashion-mnist]

Peak resident memory of the whole process, and what of it calibration added to the peak before it. The shipped cnn8;
training images, of which there are enough.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from toolkit.config import DataConfig, ExportConfig, ModelConfig, ModelRunConfig, QuantizeConfig
from toolkit.evaluators.environment import environment_record
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.prepare import prepare
from toolkit.progress import set_quiet


def peak() -> float:
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def calibrate(pipe: Connection, data: str, count: int, method: str) -> None:
    """Calibrate on so many images; what it took goes through the pipe."""
    set_quiet(True)
    settings = DataConfig(source=data)
    prepared = prepare(ModelRunConfig(model=ModelConfig(path=Path("shipped:cnn8")), data=settings, threads=1))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # nothing is known from before
        exported = export_onnx(prepared.model, Path(folder) / "fp32.onnx", ExportConfig())
        how = QuantizeConfig.model_validate({"int8": True, "calibrate": method})
        Quantizer(exported, prepared.splits.train.first(64), how)  # what any calibration takes
        before = peak()
        images = prepared.splits.train.first(count)
        Quantizer(exported, images, how)
    pipe.send((len(images), before, peak()))


def measure(data: str, count: int, method: str) -> dict[str, Any]:
    """One process."""
    context = multiprocessing.get_context("spawn")
    mine, yours = context.Pipe()
    process = context.Process(target=calibrate, args=(yours, data, count, method))
    process.start()
    yours.close()
    images, before, after = mine.recv()
    process.join()
    return {"method": method, "images": images, "peak_mib": after, "added_mib": after - before}


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="256,8192")
    parser.add_argument("--methods", default="minmax,mse")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| method | images | peak MiB | added by calibration |")
    print("| --- | --- | --- | --- |")
    for method in arguments.methods.split(","):
        for count in map(int, arguments.counts.split(",")):
            rows.append(measure(arguments.data, count, method))
            row = rows[-1]
            print(f"| {method} | {row['images']} | {row['peak_mib']:.0f} | {row['added_mib']:.1f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "environment": environment_record(1)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
