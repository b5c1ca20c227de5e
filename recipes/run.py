"""From seed to result: train the seed, allocate, train what is left, evaluate; on one process or many."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn

import allocator
from allocator.errors import ConfigurationError, DataError
from allocator.recipes.boxes import Detection
from allocator.recipes.configuration import load_config
from allocator.recipes.data import Batches, TestBatches, number, unreadable
from allocator.recipes.outcome import RunResult, Stage, as_test
from allocator.recipes.processes import agree, average_weights, make_accelerator
from allocator.recipes.run_folder import RunFolder
from allocator.recipes.sections import AllocationPlan, Config, Training
from allocator.recipes.tasks import Classification, Task, classification_loss
from allocator.recipes.training import Fit, as_text, training_bar
from allocator.recovering.record import forget_recovery
from allocator.settings import RECOVERING, Method, method_of

LOG_UPDATES = 50
"""Updates between two entries in TensorBoard's logs."""
LOOKED_AT = 16
"""Images per forward where a criterion looks at them."""
T = TypeVar("T")


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    settings: Sequence[str] = (),
    resume: bool = False,
    dry_run: int | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Train a network, allocate its neurons, train the smaller one and evaluate, as the configuration says.

    Run it under `torchrun` or `accelerate launch` for many processes; every one returns the same result.

    Args:
        config: a YAML file, the name of an installed one, its contents, or a `Config`.
        settings: changes to it, such as `final.lr=0.05`.
        resume: go on from the last checkpoint in `run.output`; from the beginning if there is none.
        dry_run: do this many updates per network, on as many test batches, and leave nothing behind.
        progress: show bars and a line per epoch.
        console: where they go; stderr by default.

    Raises:
        ConfigurationError: keys or values do not fit, or the checkpoint was made with others.
        UnknownNameError: no such network, recipe or configuration.
        DataError: data are missing, empty, unreadable, or of other classes than the network.
        InputError, UnsupportedModelError: no detector can be made of the network.
        NonFiniteLossError: the loss became NaN; the last good checkpoint is kept.
        AllocationMismatchError: the allocation in `allocation.file` does not fit the network.
        BudgetError, NothingToAllocateError: as for `allocator.allocate`.
        FileError: a file cannot be read or written.
        MissingPackageError: accelerate, TensorBoard or torchvision is needed and not installed.
    """
    loaded = load_config(config, settings)
    if dry_run is not None and dry_run < 1:
        raise ConfigurationError(f"expected a dry run of at least one update, got {dry_run}")
    if dry_run is None:
        return _Run(loaded, None, progress, console).execute(resume)
    with tempfile.TemporaryDirectory() as folder:
        return _Run(_shortened(loaded, dry_run, folder), dry_run, progress, console).execute(False)


def _shortened(config: Config, updates: int, folder: str) -> Config:
    """The configuration of a dry run; that it is over after some updates is said by the run's own limit."""

    def shorten(training: Training | None) -> Training | None:
        if training is None:
            return None
        return replace(training, epochs=1, recalibrate=min(updates, training.recalibrate))

    return replace(
        config,
        seed=shorten(config.seed),
        final=shorten(config.final),
        run=replace(config.run, output=folder),
    )


def _task_of(config: Config) -> Task:
    """The task that a configuration names."""
    if config.task == "classification":
        return Classification()
    return Detection()


class _Run:
    """One run, on this process."""

    def __init__(self, config: Config, limit: int | None, progress: bool, console: Console | None):
        self.config, self.limit, self.task = config, limit, _task_of(config)
        self.accelerator = accelerator = make_accelerator(config)
        self.main = accelerator.is_main_process
        self.shown = progress and self.main
        self.console = console or Console(stderr=True)
        self.folder = RunFolder(config)
        self.allocation: allocator.Allocation | None = None
        self.stages: list[Stage] = []
        self.corrupt: set[str] = set()

    def execute(self, resume: bool) -> RunResult:
        # Whatever can be found wrong without training is looked for ahead of it.
        saved = self.folder.checkpoint() if resume else None
        self._agree(lambda: self.folder.prepare(resume))
        network = self.task.build(self.config)
        self.data = self.task.open(self.config)
        if self.config.data.check:
            self._check_images()
        self.example = self.task.example(network, self.data)
        self._announce(network)
        if self.config.run.tensorboard:
            self.accelerator.init_trackers("logs")
        network = self._stages(network, saved)
        result = RunResult(network, self.allocation, self.stages, self.folder.path, sorted(self.corrupt), self.main)
        self._agree(lambda: self.folder.write(result))
        self.accelerator.end_training()
        return result

    def _check_images(self) -> None:
        from accelerate.utils import gather_object

        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine: list[str] = []
        for samples in (self.data.train, self.data.test):
            mine += unreadable(samples, self.config.data.workers, rank, world)
        self.corrupt |= set(gather_object(sorted(mine)))
        if self.corrupt and self.config.data.corrupt == "stop":
            total, names = len(self.data.train) + len(self.data.test), sorted(self.corrupt)
            raise DataError(
                f"{len(names)} of {total} images cannot be read: {', '.join(names[:10])}"
                f"{' ...' if len(names) > 10 else ''}; mend or remove them, or set data.corrupt=skip"
            )

    def _stages(self, network: nn.Module, saved: dict[str, Any] | None) -> nn.Module:
        config = self.config
        in_final = saved is not None and saved["stage"] == "final"
        if saved is not None:
            self._restore_stages(saved)
        if config.seed is not None and not in_final:
            network = self._fit("seed", network, config.seed, saved)
            seed = network
            self._agree(lambda: self.folder.save_network(seed, None, "seed.safetensors"))
        if config.allocation is not None:
            result = None
            if not in_final:
                self.allocation, result = self._allocate(network)
            assert self.allocation is not None
            self.accelerator.log({f"share/{name}": share for name, share in self.allocation.shares().items()}, step=0)
            # Set anew, so that fresh weights are the same whether the run has trained the seed before or goes on here.
            torch.manual_seed(number(config.random_seed, 1))
            network = allocator.apply(network, self.allocation, config.allocation.weights)
            method = method_of(config.allocation.recover)
            if result is not None and method is not None:
                network = self._recovered(result, method)
        if config.final is not None:
            network = self._fit("final", network, config.final, saved if in_final else None)
        return network

    def _restore_stages(self, saved: dict[str, Any]) -> None:
        self.stages = [Stage(**stage) for stage in saved["stages"]]
        if saved["allocation"]:
            self.allocation = allocator.Allocation.from_dict(saved["allocation"])

    # ------------------------------------------------------------------------------------------ one network

    def _fit(self, name: str, network: nn.Module, options: Training, saved: dict[str, Any] | None) -> nn.Module:
        """Train, average, recalibrate and evaluate one network."""
        fit = Fit(network, self._batches(options), options, self.accelerator, self.config.random_seed, name, self.task)
        if saved is not None:
            self.folder.restore(fit, saved["fit"])
            self._say(f"{name}: going on at update {fit.step} of {fit.total}")
        else:
            # Ahead of the first update: a run that is stopped early goes on here, and does not allocate again.
            self._save_state(fit)
        with training_bar(fit, f"{name} network", self.shown, self.console) as show:

            def after_update(current: Fit) -> None:
                show(current)
                if current.step % self.config.run.checkpoint_updates == 0:
                    self._save_state(current)
                if current.step % LOG_UPDATES == 0:
                    self._log(current, current.figures())

            def after_epoch(current: Fit) -> None:
                current.history.test.append(self._evaluate(current.result()))
                show(current)
                self._tell(current)
                self._save_state(current)

            fit.run(after_update, after_epoch)
        if options.recalibrate:
            fit.recalibrate()
        return self._finish(fit)

    def _finish(self, fit: Fit) -> nn.Module:
        """The trained network on the CPU, the same on all processes, and its figures."""
        trained = fit.result()
        if fit.average is None:
            # accelerate has put wrappers around it, which neither files nor a second network are to have.
            trained = self.accelerator.unwrap_model(fit.model, keep_fp32_wrapper=False)
        history = fit.history
        test = history.test[-1]
        if fit.options.recalibrate:
            # The last epoch's figures are those of other statistics.
            test = self._evaluate(trained)
        average_weights(trained, self.accelerator)
        self.accelerator.free_memory()
        trained = trained.cpu().eval()
        flops = self.task.flops(trained, self.example)
        self.stages.append(Stage(fit.name, test, flops, _count(trained), history.seconds, **fit.figures()))
        self.corrupt |= fit.corrupt
        return trained

    def _batches(self, options: Training) -> Batches:
        return Batches(
            self.data.train,
            options.batch_size,
            options.device_batch,
            self.config.random_seed,
            self.config.data.workers,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.limit,
        )

    def _evaluate(self, network: nn.Module) -> dict[str, float]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        size = self.task.test_batch
        if self.limit is not None:
            # A dry run is to show that things fit together, and large batches would make it wait.
            size = min(8, size)
        batches = TestBatches(self.data.test, size, self.config.data.workers, rank, world, self.limit)
        return self.task.evaluate(network, batches, self.accelerator, self.corrupt)

    def _allocate(self, network: nn.Module) -> tuple[allocator.Allocation, allocator.Result | None]:
        """The allocation, the same on all processes; and what came of it where that is to be recovered."""
        plan = self.config.allocation
        assert plan is not None
        file = plan.file
        if file is not None:
            return self._agree(lambda: allocator.Allocation.load(file)), None
        if not plan.looks_at_data() and method_of(plan.recover) is None:
            return self._agree(lambda: self._chosen(network, plan, {}).allocation), None
        # Every process looks at images of its own and gets what all have found, so that all choose alike.
        data = {}
        if plan.looks_at_data():
            data = {"data": self._looked_at(plan.samples), "loss": classification_loss}
        result = self._chosen(network, plan, data)
        return result.allocation, result

    def _recovered(self, result: allocator.Result, method: Method) -> nn.Module:
        """What is left, refitted on training images, over all processes."""
        images = (images for images, _ in self._looked_at(RECOVERING.samples))
        recovered = allocator.recover(result, images, method)
        self._say(f"recovered: {recovered.recovery}")
        if self.config.final is not None:
            forget_recovery(recovered.model)  # trained on, it is no longer the cut one but for some weights
        return recovered.model

    def _chosen(self, network: nn.Module, plan: AllocationPlan, data: dict[str, Any]) -> allocator.Result:
        options: dict[str, Any] = {**plan.budgets(), **plan.options(), **data}
        options["exclude"] = [*plan.exclude, *self.task.protected]
        # Shown where the run's other lines are: on stderr they would tear the bars. The weights are decided when the
        # allocation is applied, on every process.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = allocator.allocate(network, example_inputs=self.example, **options)
        for warning in caught:
            self._say(f"note: {warning.message}")
        self._say(
            f"allocated: {result.flops_before:,} FLOPs before, {result.flops_after:,} after; certificate "
            f"{'passed' if result.certificate.ok else 'failed'}"
        )
        return result

    def _looked_at(self, samples: int) -> Iterator[tuple[Any, Any]]:
        """Training images for criteria, with their labels, in the order of an epoch."""
        world = self.accelerator.num_processes
        size = min(LOOKED_AT * world, len(self.data.train) // world * world)
        batches = Batches(
            self.data.train,
            size,
            seed=self.config.random_seed,
            workers=self.config.data.workers,
            rank=self.accelerator.process_index,
            world=world,
            limit=max(1, samples // max(size, 1)),
        )
        for chunks in batches.epoch(0):
            for chunk in chunks:
                self.corrupt |= set(chunk.corrupt)
                yield chunk.images, chunk.labels

    # ------------------------------------------------------------------------------------- talking and agreeing

    def _agree(self, make: Callable[[], T]) -> T:
        return agree(self.accelerator, make)

    def _save_state(self, fit: Fit) -> None:
        # Every process makes it, as what they differ in is averaged; one writes it.
        state = fit.state_dict()
        if self.main:
            self.folder.save_state(fit.name, state, self.stages, self.allocation)

    def _say(self, text: str) -> None:
        if self.shown:
            self.console.print(text, highlight=False, soft_wrap=True)

    def _announce(self, network: nn.Module) -> None:
        shape = getattr(self.example, "shape", None)
        size = f" of {'x'.join(map(str, shape[1:]))}" if shape else ""
        self._say(
            f"{self.config.network.name}: {_count(network):,} parameters; {len(self.data.train):,} training and "
            f"{len(self.data.test):,} test images{size}; "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}, "
            f"precision {self.config.precision}"
        )

    def _tell(self, fit: Fit) -> None:
        history, epoch = fit.history, len(fit.history.loss)
        shown = fit.figures()
        for key, value in history.test[-1].items():
            shown[f"test {key}"] = value
        self._say(f"{fit.name} epoch {epoch}/{fit.options.epochs}  {as_text(shown)}  {history.seconds:.0f} s")
        self._log(fit, fit.figures() | as_test(history.test[-1]))
        unread = fit.corrupt | self.corrupt
        if unread:
            self._say(f"{len(unread)} images cannot be read, such as {min(unread)}")

    def _log(self, fit: Fit, values: Mapping[str, float]) -> None:
        named = {f"{fit.name}/{key}": value for key, value in {**values, "rate": fit.rate}.items()}
        self.accelerator.log(named, step=fit.step)


def _count(network: nn.Module) -> int:
    """How many numbers a network's parameters are."""
    return sum(parameter.numel() for parameter in network.parameters())
