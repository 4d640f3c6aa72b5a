"""Options of `scripts/serve.py` and `scripts/app.py`."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from elastic3d.errors import UserError
from elastic3d.evaluation.options import Runner
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option

MOST_PIXELS = 178_956_970  # that Pillow opens


@dataclass(kw_only=True)
class ServerConfig(Options):
    """What the HTTP API and the web app have in common."""

    model: str = option("", "Folder of the model, or a published model's name; empty: the bundled model.")
    weights: str = option("", "Folder with a published model's weights.")
    routers: str = option("", "Folder of trained routers for this model.")
    host: str = option("127.0.0.1", "Address to listen on; any but a loopback address needs a token.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    token: str = option(
        "",
        "What callers have to send (`Authorization: Bearer TOKEN`) or log in with; empty: $ELASTIC3D_TOKEN, or none.",
    )
    queue: int = option(64, "Jobs that may wait; a further one is refused (HTTP 429).", ge=1, le=100_000)
    batch_size: int = option(
        8, "Waiting jobs with equal options that are generated at a time, if memory suffices.", ge=1, le=1024
    )
    keep_s: float = option(
        600.0, "Seconds for which the mesh of a finished job can be fetched.", ge=1, le=86_400
    )
    max_megabytes: float = option(20.0, "Largest body of a request, or uploaded file.", ge=0.01, le=10_000)
    max_pixels: int = option(25_000_000, "Most pixels of an image.", ge=64, le=MOST_PIXELS)
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    low_memory: bool = option(False, "One part of the model on the device at a time: slower.")
    memory_budget: float | None = option(
        None, "Published models: use at most this many GB; null: what is free.", ge=0.01, le=1e5
    )

    def require_token(self) -> None:
        """UserError where anybody on the network could ask without a token."""
        if not self.token and not is_loopback(self.host):
            raise UserError(
                f"host is {self.host}, which others can reach, and there is no token: set token= or $ELASTIC3D_TOKEN,"
                " or listen on 127.0.0.1"
            )

    def require_port(self) -> None:
        """UserError where nothing can listen. Port 0 becomes a free one."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.create_server((self.host, self.port), family=family) as server:
                self.port = server.getsockname()[1]
        except OSError as error:
            raise UserError(
                f"can't listen on host={self.host} port={self.port}: {(error.strerror or str(error)).lower()}"
            ) from error

    @property
    def address(self) -> str:
        """For a browser."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def rows(self) -> int:
        """Jobs generated at a time."""
        return 1 if self.low_memory else self.batch_size

    def generate_config(self) -> GenerateConfig:
        """What `pipelines.generation.load_pipeline` takes."""
        return GenerateConfig(
            image="-",
            output="-",
            model=self.model,
            weights=self.weights,
            routers=self.routers,
            device=self.device,
            dtype=self.dtype,
            low_memory=self.low_memory,
            memory_budget=self.memory_budget,
        )


@dataclass(kw_only=True)
class ServeConfig(ServerConfig):
    """The HTTP API in front of one model."""

    timeout_s: float = option(
        300.0,
        "Seconds after which a request that waits for its mesh is answered with 504.",
        ge=0.1,
        le=86_400,
    )
    stop_s: float = option(
        60.0, "Seconds that a running batch is given when the server stops.", ge=0, le=3600
    )
    runner: Runner = option(Runner.local, "local: one process; ray: replicas on the cluster of RAY_ADDRESS.")
    replicas: int = option(
        1, "With runner=ray: processes with a model each; above 1 without jobs.", ge=1, le=4096
    )

    def check(self) -> None:
        """Replicas are Ray's."""
        if self.replicas > 1 and self.runner is not Runner.ray:
            raise ValueError(f"replicas is {self.replicas}, expected runner=ray with it")


@dataclass(kw_only=True)
class AppConfig(ServerConfig):
    """The web app."""

    models: list[str] = option(
        [],
        "Further models to choose from, one in memory at a time: folders, or published models whose weights are looked"
        " for as gen_mesh.py does.",
    )


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
