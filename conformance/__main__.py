"""
``python -m conformance``: every suite over every configuration, on servers of its own.

Prints one table for savers and one for stores. Exits with 1 if anything of
ours failed or was skipped.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from conformance.savers import Cell, Outcome, matrix, run_suites, saver_for
from conformance.store import validate_stores
from langgraph_vat.embedded import EmbeddedServers


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="vat-conformance-") as path:
        Path(path).chmod(0o755)
        with EmbeddedServers.start(path) as servers:
            outcomes = {cell: _run(cell, servers) for cell in matrix()}
            failures = _print_savers(outcomes)
            failures += validate_stores(servers.postgres)
    print(f"\n{failures} failed or skipped" if failures else "\nzero failures, zero skips")
    return 1 if failures else 0


def _run(cell: Cell, servers: EmbeddedServers) -> Outcome:
    with saver_for(cell, servers.postgres, servers.redis) as saver:

        async def run() -> Outcome:
            outcome = await run_suites(saver)
            await saver.saver.aclose()
            return outcome

        return asyncio.run(run())


def _print_savers(outcomes: dict[Cell, Outcome]) -> int:
    names = list(next(iter(outcomes.values())).passed)
    columns = ["sealing", "flush_every", "hot tier", "face", *names]
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for cell, outcome in outcomes.items():
        counts = [_count(outcome, name) for name in names]
        print(f"| {cell.sealing} | {cell.flush_every} | {cell.hot_tier} | {cell.face} | ", end="")
        print(" | ".join(counts) + " |")
    total = 0
    for cell, outcome in outcomes.items():
        for capability, failed in outcome.failed.items():
            total += len(failed)
            for message in failed:
                print(f"FAILED {cell}: {capability}: {message}")
    return total


def _count(outcome: Outcome, capability: str) -> str:
    failed = outcome.failed.get(capability, [])
    passed = outcome.passed.get(capability, 0)
    return f"{passed} of {passed + len(failed)} FAILED" if failed else str(passed)


if __name__ == "__main__":
    sys.exit(main())
