"""A training in a process of its own, to be killed, resumed and divided: `python worker.py '{"folder": ...}'`.

It learns to interpolate noise and points with `fit`, a pipeline and a `Checkpointer`, prints a line per row, and leaves the final state
in `final.npz` and its rows in `rows.jsonl`.

Without an argument it serves: for each message of its standard input, a Unix socket, a training is forked off, so that all of them
share the import of JAX, a third of a training's time. JAX makes its threads when it is first used, which is after the fork.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path

os.environ["PJRT_NPROC"] = "16"

import jax
import numpy as np
import optax

from fmjax import checkpoints, files, losses, parallel, paths, training
from fmjax.checkpoints import store
from fmjax.data import images, pipeline
from fmjax.models import mlp

# `training.tensorboard` imports it, here before any training is forked.
importlib.import_module("tensorboardX")

DEFAULTS = {
    **{"steps": 24, "log_every": 2, "save_every": 2, "keep": 3, "sharding": "replicated", "devices": 1},
    **{"processes": 1, "index": 0, "port": 0, "timeout": 100, "connect": 300},
    # Whether the optimiser may be another than that of the checkpoint.
    **{"optimizer": "adam", "new_optimizer": False},
    # Seconds that a log, a batch and the end of a write take.
    **{"pause": 0.0, "wait": 0.0, "write": 0.0},
}
OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "clipped adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "adam with a schedule": optax.adam(optax.linear_schedule(1e-3, 0.0, 24)),
    "sgd with momentum": optax.sgd(1e-3, momentum=0.9),
}


def main(given):
    config = DEFAULTS | given
    folder = Path(config["folder"])
    jax.config.update("jax_num_cpu_devices", config["devices"])
    if "cache" in config:
        jax.config.update("jax_compilation_cache_dir", config["cache"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    # Small arrays are written as large ones are: every device that has one writes its slice.
    store.SMALLEST_SLICE = 1
    if config["processes"] > 1:
        at = f"localhost:{config['port']}"
        parallel.initialize(at, config["processes"], config["index"], connect=config["connect"], timeout=config["timeout"])
    mesh = parallel.mesh()
    model, optimizer = mlp.MLP(hidden_size=64, depth=2), OPTIMIZERS[config["optimizer"]]
    points = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)

    def loss_fn(params, key, batch):
        x_1, _ = batch
        key_0, key_t = jax.random.split(key)
        x_0, t = jax.random.normal(key_0, x_1.shape), jax.random.uniform(key_t, x_1.shape[:1])
        return losses.flow_matching(lambda x, t: model.apply(params, x, t), paths.Linear(), x_0, x_1, t).mean()

    def make():
        return training.init(model.init(jax.random.key(0), points[:1], 0.5), optimizer)

    pmapped = config["sharding"] == "pmap"
    layout = {"fully_sharded": lambda tree, mesh: parallel.fully_sharded(tree, mesh, min_size=16)}.get(
        config["sharding"], parallel.replicated
    )
    step = training.make_step(loss_fn, optimizer, axis_name=parallel.AXIS if pmapped else None, ema_decay=0.9)
    step = parallel.pmap(step, mesh) if pmapped else step
    state = parallel.create(make, mesh, layout)
    stream = pipeline.batches(images.arrays(points, np.zeros(len(points), np.int32)), 16, seed=3, threads=0)
    stream = pipeline.to_device(stream, sharding=parallel.batch_sharding(mesh, 16))
    key = jax.random.key(5)

    class Slow:
        """The stream, whose batches take their time."""

        def __iter__(self):
            return self

        def __next__(self):
            time.sleep(config["wait"])
            return next(stream)

        get_state, set_state = stream.get_state, stream.set_state

    checksums = files.checksums

    def slow_checksums(*arguments):
        print("writing", flush=True)
        time.sleep(config["write"])
        return checksums(*arguments)

    files.checksums = slow_checksums
    with checkpoints.Checkpointer(folder / "checkpoints", keep=config["keep"]) as checkpointer:
        run = checkpointer.resume(training.Run(state, key), new_optimizer=config["new_optimizer"])
        print(f"from {int(run.state.step)}", flush=True)

        def logged(run, metrics):
            print(f"row {metrics['step']}", flush=True)
            time.sleep(config["pause"])

        where = Path(config.get("logs", folder))
        logs = [training.json_lines(where / "rows.jsonl", run.history), training.tensorboard(where / "tensorboard", run.history)]
        run = training.fit(
            step,
            run,
            Slow(),
            steps=config["steps"],
            log_every=config["log_every"],
            callbacks=[*logs, logged],
            save=checkpointer.save,
            save_every=config["save_every"],
            progress=False,
            donate=True,
        )
        state = run.state
        whole = jax.jit(lambda state: state, out_shardings=parallel.replicated(state, mesh))(state)
        if jax.process_index() == 0:
            leaves = jax.tree_util.tree_leaves_with_path(whole)
            np.savez(folder / "final.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    print("done", flush=True)


def served():
    """What a forked training is asked for; the process that serves does not return.

    With a message come two pipes: what the training prints goes to the first, and its process id, then its exit status, to the second.
    """
    server = socket.socket(fileno=0)
    while server.recv(1, socket.MSG_PEEK):
        message, (printed, told), *_ = socket.recv_fds(server, 1 << 16, 2)
        if not os.fork():
            break
        os.close(printed)
        os.close(told)
    else:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        sys.exit()
    # This one waits for the training, since only its parent can.
    server.close()
    os.open(os.devnull, os.O_RDONLY)
    if training := os.fork():
        os.close(printed)
        os.write(told, f"{training}\n".encode())
        os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(training, 0)[1])}\n".encode())
        os._exit(0)
    os.close(told)
    os.setsid()
    for output in (1, 2):
        os.dup2(printed, output)
    os.close(printed)
    return json.loads(message)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else served())
