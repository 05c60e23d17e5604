"""The suite that the package of every chapter passes.

`NANOVLLM_STAGE=K pytest tests/conformance` tests the package as of chapter K; without the
variable it tests `nanovllm/` as it stands in the repository, that is as of the last chapter.
`NANOVLLM_ONE_IN=N` asks of what earlier chapters hold one test in N, others at each stage.
`NANOVLLM_DEVICE=cuda` runs the engines on a GPU; without the variable they run on the CPU.
A folder `from_stage_N` holds what is true from chapter N on, and is left out before.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "nanovllm" / "tiny"
STAGE = os.environ.get("NANOVLLM_STAGE")
sys.path[:0] = [str(ROOT), str(ROOT / "chapters")]


def chapter_under_test() -> int:
    """The chapter whose package is tested."""
    notebooks = (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")
    return int(STAGE or max(int(path.name[:2]) for path in notebooks))


collect_ignore = [
    folder.name
    for folder in Path(__file__).parent.glob("from_stage_*")
    if int(folder.name.rpartition("_")[2]) > chapter_under_test()
]
if importlib.util.find_spec("hypothesis") is None:  # a GPU machine may do without
    collect_ignore_glob = ["from_stage_*/test_random_operations.py"]


def pytest_configure(config):
    """Put the stage first on the path, before anything imports nanovllm."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to be float32 on a GPU too
    if STAGE:
        import tangle

        assert "nanovllm" not in sys.modules
        folder = tempfile.mkdtemp(prefix="nanovllm-stage-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        tangle.write_stage(int(STAGE), Path(folder))
        sys.path.insert(0, folder)
        found = importlib.util.find_spec("nanovllm").origin
        assert found.startswith(folder), f"stage {STAGE} lies in {folder}, nanovllm is {found}"


def pytest_collection_modifyitems(config, items):
    """Leave out what has its turn at another stage; N stages in a row ask everything."""
    from run import is_asked

    one_in, stage = int(os.environ.get("NANOVLLM_ONE_IN", 1)), chapter_under_test()
    chosen, left_out = [], []
    for item in items:
        name = item.nodeid.partition("conformance/")[2]
        (chosen if is_asked(name, stage, one_in) else left_out).append(item)
    items[:] = chosen
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_report_header():
    """Which package is under test."""
    return f"conformance: package as of chapter {STAGE}" if STAGE else "conformance: nanovllm/"


@pytest.fixture(scope="session")
def bundled():
    """The bundled model's folder."""
    return TINY


@pytest.fixture(scope="module")
def llm():
    """One engine on the bundled model, shared by a module: each test must leave it empty."""
    from device import build

    engine = build(dtype="float32")
    yield engine
    assert engine.is_finished()
    engine.exit()


@pytest.fixture
def make_llm():
    """`make_llm(folder, **options)` builds an engine in float32."""
    from device import build

    engines = []

    def make(model: Path | None = None, **options):
        engines.append(build(model, **{"dtype": "float32", **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.exit()


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """A small random checkpoint without a tokenizer, for tests that only read it."""
    from checkpoints import save_random

    return save_random(tmp_path_factory.mktemp("random"))


@pytest.fixture
def hashed(monkeypatch):
    """The blocks that have been hashed, one entry a call; from stage 4 on."""
    from nanovllm.engine.block_manager import BlockManager

    calls, compute = [], BlockManager.compute_hash

    def counting(token_ids, *args):
        calls.append(list(token_ids))
        return compute(token_ids, *args)

    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(counting))
    return calls


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test may change torch's defaults."""

    def settings():
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
        )

    before = settings()
    yield
    assert settings() == before
