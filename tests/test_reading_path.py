"""How much code a reader of one generation passes: it may shrink, and grows only on purpose."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_FILES = 3204, 35

TRACER = """
import json, runpy, sys, threading
from pathlib import Path
root, script, seen = Path(sys.argv[1]), sys.argv[2], {}
known = set()
def note(frame, event, _):  # of each call, and of nothing within it: it returns no tracer
    code = frame.f_code
    if code in known:
        return
    known.add(code)
    own = code.co_filename.startswith(str(root)) and "/.venv/" not in code.co_filename
    if own and code.co_flags & 1:
        last = max((line for _, _, line in code.co_lines() if line), default=0)
        seen.setdefault(code.co_filename, set()).update(range(code.co_firstlineno, last + 1))
sys.argv = sys.argv[2:]
sys.path[:0] = [str(root), str(root / "scripts")]
threading.settrace(note)
sys.settrace(note)
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    code = stop.code
finally:
    sys.settrace(None)
print(json.dumps([code, {str(Path(k).relative_to(root)): len(v) for k, v in seen.items()}]))
"""


def test_one_generation_passes_through_no_more_code_than_before(tmp_path: Path) -> None:
    """Lines of every function of this repository that `gen_mesh.py` calls, from its first to its last."""
    command = [sys.executable, "-c", TRACER, str(ROOT), str(ROOT / "scripts" / "gen_mesh.py")]
    command += [
        f"image={ROOT / 'data/samples/chair.png'}",
        f"output={tmp_path / 'chair.glb'}",
        "resolution=32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    code, lines = json.loads(done.stdout.splitlines()[-1])
    assert not code, done.stderr
    longest = sorted(lines.items(), key=lambda item: -item[1])[:10]
    assert sum(lines.values()) <= MOST_LINES and len(lines) <= MOST_FILES, longest
    assert sum(lines.values()) > MOST_LINES // 2, "the trace has lost most of the generation"
