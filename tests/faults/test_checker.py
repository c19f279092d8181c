"""
The bench notices what it is there to notice: the package is broken on purpose, and it must say so.
"""

import os
import subprocess
import sys

import pytest

from tests.mutations import Mutation, broken

CHANGES = {
    "lost: ": (
        "redis_emptied",
        "_ops/hot.py",
        "            shared.copies.add(thread_id, entry)\n",
        "            pass\n",
    ),
    "lost: {'op': 'writes'": (
        "worker_paused",
        "_ops/flush.py",
        "        for write in entry.writes:\n            key",
        "        for write in entry.writes[1:]:\n            key",
    ),
    "stale: ": (
        "worker_paused",
        "_hot/scripts/put.lua",
        "newest = not less(id, current)\n",
        "newest = not less(id, current) and not id:sub(-1):find('[0-7]')\n",
    ),
    "resurrected: ": (
        "worker_paused",
        "_ops/retention.py",
        "    await change_history(shared, backend, thread_id, body, is_deletion=True)\n",
        "",
    ),
    "changed: ": (
        "worker_paused",
        "_ops/compact.py",
        "                found[key] = codecs[thread_id].open(blob.type, blob.data,",
        (
            "                data = b'\\x07' if blob.channel == 'size' else blob.data\n"
            "                found[key] = codecs[thread_id].open(blob.type, data,"
        ),
    ),
}


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("said", CHANGES)
def test_the_bench_notices(said):
    kind, *change = CHANGES[said]
    mutation = Mutation("", *change, "")
    test = "tests/faults/test_faults.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "soak", "-k", "contract[16]", test]
    environment = {**os.environ, "FAULTS": "24", "FAULTS_ONLY": kind}
    with broken(mutation) as copy:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert said in done.stdout
