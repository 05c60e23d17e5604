"""The device under test: the CPU, or the one that NANOVLLM_DEVICE names.

    NANOVLLM_DEVICE=cuda python -m pytest tests/conformance

On a GPU an engine takes a small part of the memory, for several live at once, and few sequences
at a time, for each size of a batch costs a recording.
"""

from __future__ import annotations

import os
from dataclasses import fields

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config

DEVICE = os.environ.get("NANOVLLM_DEVICE", "cpu")
ON_GPU = torch.device(DEVICE).type == "cuda"
OPTIONS = {spec.name for spec in fields(Config)}
PARAMETERS = {spec.name for spec in fields(SamplingParams)}


def offered(**options) -> dict:
    """Those of the options that the package under test has."""
    return {name: value for name, value in options.items() if name in OPTIONS}


def askable(**parameters) -> dict:
    """Those of the sampling parameters that the package under test has."""
    return {name: value for name, value in parameters.items() if name in PARAMETERS}


# One step after the other, each launched kernel by kernel: for what a single step does. On a CPU
# that is the default.
PLAIN = offered(async_scheduling=False, enforce_eager=True)
SMALL = offered(max_num_seqs=64, gpu_memory_utilization=0.05) if ON_GPU else {}


def build(model=None, **options) -> LLM:
    """An engine on the device under test."""
    return LLM(model, **{"device": DEVICE, **SMALL, **options})
