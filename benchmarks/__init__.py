"""One script per published claim: `python -m benchmarks.NAME --out FILE.json [--quick]`."""
