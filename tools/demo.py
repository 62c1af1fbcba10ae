"""A page on 127.0.0.1 to try a model: python -m tools.demo checkpoint=out/ckpt.pt

The page is for the machine that it runs on: there is no setting for another address. To use it from
elsewhere, open a tunnel: ssh -L 8000:127.0.0.1:8000 machine.
"""

import socket

from model import ModelConfig, Transformer
from nanomdm import cli, devices
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError


def main(config: Section) -> None:
    try:
        from tools.server import Demo, Limits, make_server
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install starlette uvicorn") from None
    check(config)
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    context = loaded.model.config.block_size
    if config.length > context:
        raise UserError(f"length={config.length} must be at most model.block_size, {context}")
    limits = Limits(
        config.checkpoint,
        config.prompt,
        config.length or context,
        config.steps,
        config.generations,
        config.seconds,
    )
    server = make_server(Demo(loaded, limits))
    listening = listen(config.port)
    print(f"http://127.0.0.1:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listening])


def check(config: Section) -> None:
    """Raise `UserError` for a setting out of its range."""
    counts = {"steps": config.steps, "generations": config.generations, "seconds": config.seconds}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value:g} must be at least 1")
    if config.length < 0:
        raise UserError(f"length={config.length} must be 0 (the model's context) or more")
    if not 0 <= config.port < 65536:
        raise UserError(f"port={config.port} must lie in 0 ... 65535")


def listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UserError(
            f"cannot serve on port={port} ({error.strerror}): choose another"
        ) from error


if __name__ == "__main__":
    cli.main(main, "tools/demo")
