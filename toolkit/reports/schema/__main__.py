"""Prints the JSON Schema of the report."""

from toolkit.reports.schema import schema_text

print(schema_text(), end="")
