"""What an import loads, and what it needs: a program that only asks for help waits for nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

PACKAGE = Path(nanovllm.__path__[0]).parent


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch leaves it in this process
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=PACKAGE, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


HEAVY = "{'torch', 'triton', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'}"
LOADED = f"import sys; print(*({HEAVY} & {{name.split('.')[0] for name in sys.modules}}))"
LIGHT = [
    "import nanovllm",
    "from nanovllm import SamplingParams; SamplingParams()",
    "import nanovllm.__main__; nanovllm.__main__.make_parser()",
    "from nanovllm.config import Config; Config()",
    "import nanovllm.engine.sequence",
]


@pytest.mark.parametrize("code", LIGHT)
def test_what_needs_no_torch_loads_none(code):
    assert python(f"{code}\n{LOADED}").split() == []


def test_llm_is_loaded_when_it_is_asked_for():
    shown = python(
        "import nanovllm, sys; print('LLM' in dir(nanovllm), 'torch' in sys.modules);"
        "from nanovllm import *; print(LLM is nanovllm.LLM, 'torch' in sys.modules);"
        "print(LLM.__module__, SamplingParams.__module__)"
    )
    assert shown.split() == "True False True True nanovllm.llm nanovllm.sampling_params".split()


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nanovllm.*LLMs"):
        nanovllm.LLMs  # noqa: B018
    with pytest.raises(ImportError, match="LLMs"):
        from nanovllm import LLMs  # noqa: F401
    assert not hasattr(nanovllm, "__wrapped__")


RUN = """
from nanovllm import LLM, SamplingParams
llm = LLM(device="cpu")
params = SamplingParams(temperature=0, max_tokens=4, stop="never in the text")
print(len(llm.generate([[5] * 40, "Once"], params, use_tqdm=False)))
print(len(llm.generate([[5] * 40 + [6] * 9, [5] * 40], params, use_tqdm=False)))
"""


@pytest.fixture(scope="module")
def light_transformers() -> None:
    """Older releases of transformers load torch's compiler with their tokenizers."""
    load = (
        "from transformers import AutoTokenizer; import sys; print('torch._dynamo' in sys.modules)"
    )
    if python(load) != "False\n":
        pytest.skip("this release of transformers loads torch's compiler itself")


def test_an_engine_on_a_cpu_loads_no_compiler(light_transformers):
    code = (
        RUN + "import sys\nprint('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    )
    assert python(code).split() == ["2", "2", "False", "False"]


def test_a_machine_without_a_writable_temporary_folder_runs_it(light_transformers):
    deny = """
import tempfile
def deny():
    raise FileNotFoundError(2, "No usable temporary directory found")
tempfile._get_default_tempdir, tempfile.tempdir = deny, None
"""
    assert python(deny + RUN).split() == ["2", "2"]
