"""The server's options."""

import os
import sys
from dataclasses import dataclass

from nanovllm.utils.options import check_options, option


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How to serve; frozen once checked. A misfit raises ValueError."""

    host: str = option("127.0.0.1", "address to listen on; others than this machine's need a key")
    port: int = option(8000, "port to listen on; 0: any free one", minimum=0, maximum=65535)
    api_key: str | None = option(
        None, "what callers must send as Authorization: Bearer KEY (or set NANOVLLM_API_KEY)"
    )
    served_model_name: str | None = option(None, "what callers call the model")
    http_processes: int | None = option(
        None, "processes that speak HTTP (default: one for every 4 cores, at most 4)", minimum=1
    )
    max_open: int = option(1024, "most requests that run or wait; more are told to come later")
    max_body_bytes: int = option(4 << 20, "longest body of a request", minimum=1)
    allowed_origins: list[str] | tuple[str, ...] = option(
        (), "a web page's origin that may call from a browser (CORS)"
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def num_http_processes(self) -> int:
        """As asked for; else by the number of cores, where the system shares out connections."""
        most = min(4, (os.cpu_count() or 1) // 4) if sys.platform == "linux" else 1
        return self.http_processes or max(1, most)

    def name_of(self, model: str) -> str:
        """What callers call the model: as asked for, else the last part of its path or name."""
        return self.served_model_name or model.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How to answer a batch file; frozen once checked. A misfit raises ValueError."""

    workers: int = option(1, "engines, each with its own GPU or CPU; several run on Ray", minimum=1)
    address: str | None = option(
        None, "a Ray cluster that is there: auto or HOST:PORT (default: start one on this machine)"
    )
    served_model_name: str | None = option(None, "what requests call the model")

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs_ray(self) -> bool:
        """Is there more to it than one engine on this machine?"""
        return self.workers > 1 or self.address is not None
