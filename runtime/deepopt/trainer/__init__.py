"""`DeepTrainer`: trains a model that is at hand, in a script or a notebook, on the same head and workers
as `deepopt launch`.

    from deepopt.trainer import DeepTrainer
    DeepTrainer(model=model, device_map={"gpu0": [0, 1, 2, 3], "gpu1": [4, 5, 6, 7]}).fit(dataset, epochs=10)

docs/trainer.md says more.
"""

from __future__ import annotations

from deepopt.trainer.callbacks import Callback
from deepopt.trainer.trainer import DeepTrainer, FitResult

__all__ = ["Callback", "DeepTrainer", "FitResult"]
