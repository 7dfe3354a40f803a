"""Programs: `python -m experiments.NAME`."""

import importlib.util

if importlib.util.find_spec("tyro") is None:
    raise ModuleNotFoundError(
        "The experiments need tyro, and more, which an extra names: pip install -e '.[experiments]', in the folder of the copy."
    )
