"""A model that trains and saves step by step, on test ranks."""

from tests.parallel.training_runs import EP2, SyntheticDataset, begin_training, settings


class Run:
    """A model that trains and saves, on each test rank."""

    def __init__(self, folder, model=None, **checkpoint):
        import torch.distributed as dist

        from moepp_megatron.training.batches import rank_batches

        ranks = dist.get_world_size()
        raw = settings(
            model={"num_layers": 2, **(model or {})},
            parallel=EP2 if ranks == 2 else {},
            training={"global_batch_size": 4, "micro_batch_size": 4 // ranks},
            checkpoint={"save_interval": 1, **checkpoint},
        )
        self.config, self.layout, self.model = begin_training(raw)
        dataset = SyntheticDataset(self.config, 40)
        self.batches = rank_batches(dataset, 0, self.config, len(self.model.chunks))
        self.begin_in(folder)

    def begin_in(self, folder):
        """Count steps from 0 again, with the weights that are there, and save into a folder."""
        from moepp_megatron.training.checkpoint.files import Progress
        from moepp_megatron.training.checkpoint.write import CheckpointWriter

        self.progress = Progress()
        self.writer = CheckpointWriter(folder, self.config, folder / "no tokenizer")

    def step(self):
        from moepp_megatron.training.step import training_step

        training_step(self.model, self.batches, self.config, self.layout)
        self.progress = self.progress.after_step(4, 4 * 16)
        if self.writer.is_written():
            self.writer.finish()

    def save(self, wait=True):
        """Save; returns why that failed."""
        self.writer.save(self.model, self.progress, {"note": self.progress.step})
        if wait:
            self.writer.finish()
        return self.writer.error


def names(folder):
    return sorted(path.name for path in folder.iterdir())
