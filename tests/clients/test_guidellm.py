"""GuideLLM, a load generator: all that it asks for is answered, and its counts are ours."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_request_of_a_load_is_answered(url, tiny, tmp_path, path):
    backend = f"kind=openai_http,target={url},model=nanovllm-tiny,api_key=sesame"
    options = {
        "backend": f"{backend},request_format={path}",
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=12",
        "data": "kind=synthetic_text,prompt_tokens=40,output_tokens=16",
        "tokenizer": f"kind=huggingface_auto,model={tiny}",
        "output": f"kind=json,path={tmp_path / 'load.json'}",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (load,) = json.loads((tmp_path / "load.json").read_text())["benchmarks"]
    totals = load["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (12, 0)
    lengths = load["metrics"]["output_token_count"]["successful"]
    assert lengths["min"] == lengths["max"] == 16
    assert load["metrics"]["time_to_first_token_ms"]["successful"]["median"] > 0
