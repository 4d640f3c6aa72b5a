"""`import elastic3d`: fast, with the public names, and with idle threads that sleep."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import json, os, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {before}
    import elastic3d
heavy = [name for name in ("torch", "numpy", "trimesh", "diffusers") if name in sys.modules]
found = [w for w in caught if issubclass(w.category, RuntimeWarning) and "before elastic3d" in str(w.message)]
print(json.dumps([heavy, os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), len(found)]))
"""


def probe(before: str = "pass", **more: str) -> list:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", PROBE.format(before=before)]
    done = subprocess.run(command, env=env | more, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_idle_threads_sleep_unless_somebody_chose_otherwise():
    assert probe() == [[], "passive", "2500", 0]
    assert probe(OMP_WAIT_POLICY="active") == [[], "active", None, 0]


def test_where_torch_came_first_it_says_so():
    stand_in = "import types; torch = types.ModuleType('torch'); sys.modules['torch'] = torch;"
    stand_in += "torch.get_num_threads = lambda: {threads};"
    stand_in += "torch.cuda = types.SimpleNamespace(is_available=lambda: False)"
    assert probe(stand_in.format(threads=2))[1:] == [None, None, 1]
    assert probe(stand_in.format(threads=1))[1:] == [None, None, 0]


def test_public_names():
    import elastic3d
    from elastic3d import ImageTo3DPipeline, TextToImagePipeline, evaluate_pair
    from elastic3d.evaluation import protocol

    assert evaluate_pair is protocol.evaluate_pair
    assert ImageTo3DPipeline.__module__ == "elastic3d.pipelines.image_to_3d"
    assert TextToImagePipeline.__module__ == "elastic3d.pipelines.text_to_image"
    assert not hasattr(elastic3d, "anything_else")
    stub = (ROOT / "elastic3d" / "__init__.pyi").read_text()
    assert all(f"as {name}\n" in stub for name in elastic3d.__all__)
    assert (ROOT / "elastic3d" / "py.typed").is_file()


def test_help_needs_no_numeric_library():
    """`gen_mesh.py --help` answers within half a second, which torch, trimesh or scipy alone would take."""
    code = (
        "import runpy, sys; sys.path.insert(0, 'scripts'); sys.argv = ['gen_mesh.py', '--help']\n"
        "try: runpy.run_path('scripts/gen_mesh.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'trimesh', 'scipy', 'PIL', 'networkx')\n"
        "sys.exit(', '.join(name for name in heavy if name in sys.modules) or None)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: python scripts/gen_mesh.py" in done.stdout
