#!/usr/bin/env bash
# pytest-xdist 3.8.0 under pytest 9.2.0: `--dist loadgroup` accepts the marks and groups nothing.
#
# Expected from its documentation: all tests with the same @pytest.mark.xdist_group(name=...) run in
# one worker. Seen (Python 3.11, pytest 9.2.0, pytest-xdist 3.8.0): they are spread over the workers
# like any others, without a warning, so whatever the group shared in its process is made once per
# worker. With pytest 9.0.2 the same file keeps to one worker.
# Why: xdist appends "@group" to the item's private attribute _nodeid; pytest 9.2 no longer builds
# Item.nodeid from it. What still works: a scheduler by the hook pytest_xdist_make_scheduler.
#
# Ends with 0 as long as that is so, with 1 once it changes.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat >"$work/test_group.py" <<'PY'
import time

import pytest

pytestmark = pytest.mark.xdist_group(name="one")


@pytest.mark.parametrize("number", range(6))
def test_worker(number, worker_id):
    time.sleep(0.2)
    print("ran in", worker_id)
PY

workers() { # with a version of pytest: the number of workers that ran tests of the one group
    python3 -m venv "$work/$1"
    "$work/$1/bin/python" -m pip install --quiet "pytest==$1" pytest-xdist==3.8.0 >&2
    (cd "$work" && "$work/$1/bin/python" -m pytest -n 2 --dist loadgroup -rP -p no:cacheprovider \
        test_group.py) | grep -o 'ran in gw[0-9]' | sort -u | wc -l
}

before="$(workers 9.0.2)" now="$(workers 9.2.0)"
echo "workers that ran the tests of one group: pytest 9.0.2: $before, pytest 9.2.0: $now"
[[ "$before" == 1 && "$now" == 2 ]]
