"""ms-swift: a file that imports this for ``--external_plugins``, and ``--optimizer came8bit``."""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from ..variants import CAME8bit


class CAME8bitCallback(OptimizerCallback):
    """Make the groups of transformers' Trainer with CAME8bit."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the optimizer, with ``learning_rate`` and ``weight_decay`` of the arguments."""
        self.trainer.optimizer_cls_and_kwargs = CAME8bit, {"lr": self.args.learning_rate}
        return super().create_optimizer(model)


optimizers_map["came8bit"] = CAME8bitCallback
