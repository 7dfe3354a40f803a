"""Checkpoints: a pytree to a folder and back, and those of a run that it goes on from, each checked when it is read.

    with checkpoints.Checkpointer("runs/latents/checkpoints") as checkpointer:
        run = checkpointer.resume(training.Run(state, key))
        run = training.fit(step, run, stream, steps=steps, save=checkpointer.save, save_every=5000)

What is sampled is read alone by `restore_part(folder, "ema")`; another model begins from what fits it by `restore_matching`.

A checkpoint is a folder: `data-.../` by Orbax, and `checkpoint.json`, which names it, holds the SHA-256 of all its files and of itself,
and takes its predecessor's place in one rename once everything is on the disk. What is saved is the state as one program sees it,
whatever devices it lies on, so any number of devices restores it.
"""

from fmjax.checkpoints.checkpointer import Checkpointer
from fmjax.checkpoints.parts import restore_matching, restore_part
from fmjax.checkpoints.store import CorruptCheckpoint, restore, save

__all__ = ["Checkpointer", "restore_part", "restore_matching", "save", "restore", "CorruptCheckpoint"]
