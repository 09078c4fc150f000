"""petune: fine-tune a frozen Vision Transformer for many tasks by training about 1 % of its parameters.

Importing petune is cheap: a public name is imported when it is first used, and PyTorch with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petune.backbones.clips import take_clips as take_clips
    from petune.backbones.names import list_backbones as list_backbones
    from petune.base.errors import (
        AlreadyCompiled as AlreadyCompiled,
        AttachError as AttachError,
        BackboneMismatch as BackboneMismatch,
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        ContractViolation as ContractViolation,
        DataError as DataError,
        DeadSite as DeadSite,
        Diverged as Diverged,
        ExportError as ExportError,
        HubError as HubError,
        MissingExtra as MissingExtra,
        NotMergeable as NotMergeable,
        PetuneError as PetuneError,
        PluginError as PluginError,
        ProcessLost as ProcessLost,
        SiteNotFound as SiteNotFound,
        Stopped as Stopped,
        UnknownName as UnknownName,
        UsageError as UsageError,
        WeightsUnavailable as WeightsUnavailable,
    )
    from petune.base.metric import Metric as Metric, SplitMetrics as SplitMetrics
    from petune.base.plugins import PluginRecord as PluginRecord
    from petune.data.dataset import Dataset as Dataset, Split as Split
    from petune.data.load import load_dataset as load_dataset
    from petune.data.reader import (
        DatasetReader as DatasetReader,
        LabeledFiles as LabeledFiles,
        ReadContext as ReadContext,
        ReaderConfig as ReaderConfig,
    )
    from petune.data.registry import DatasetRecord as DatasetRecord, list_datasets as list_datasets
    from petune.data.target import Target as Target
    from petune.injector.attach import attach as attach
    from petune.injector.attachment import Attachment as Attachment
    from petune.injector.attention import Attention as Attention
    from petune.injector.calibration import CalibrationBatch as CalibrationBatch
    from petune.injector.counts import Counts as Counts
    from petune.injector.edit import Edit as Edit
    from petune.injector.load import load as load
    from petune.injector.peft_type import PetuneConfig as PetuneConfig, register_with_peft as register_with_peft
    from petune.injector.registry import list_tuners as list_tuners
    from petune.injector.sparse import SparseParameters as SparseParameters
    from petune.injector.token_grid import TokenGrid as TokenGrid
    from petune.injector.tuner import Recipe as Recipe, Tuner as Tuner, TunerConfig as TunerConfig
    from petune.plugin_dev.contract import check_tuner as check_tuner
    from petune.plugin_dev.dataset_contract import check_dataset as check_dataset
    from petune.plugin_dev.task_contract import check_task as check_task
    from petune.runner.compare import compare as compare
    from petune.runner.compare_config import CompareConfig as CompareConfig
    from petune.runner.comparison import Comparison as Comparison
    from petune.runner.cross_validate import CrossValidation as CrossValidation, cross_validate as cross_validate
    from petune.runner.events import RunEvent as RunEvent, RunStarted as RunStarted
    from petune.runner.executors import run_all as run_all
    from petune.runner.grid import Grid as Grid, compare_datasets as compare_datasets
    from petune.runner.pretrain import PretrainConfig as PretrainConfig, pretrain as pretrain
    from petune.runner.result import RunResult as RunResult
    from petune.runner.run import run as run
    from petune.runner.run_config import RunConfig as RunConfig
    from petune.runner.sweep.search import sweep as sweep
    from petune.runner.sweep.sweep_config import SweepConfig as SweepConfig
    from petune.runner.sweep.trials import Sweep as Sweep
    from petune.serving.adapter_bank import AdapterBank as AdapterBank
    from petune.serving.average import (
        Averaged as Averaged,
        AveragedFrom as AveragedFrom,
        average_adapters as average_adapters,
    )
    from petune.serving.convert import Converted as Converted, convert as convert
    from petune.serving.evaluation import Evaluation as Evaluation, evaluate as evaluate
    from petune.serving.export import Exported as Exported, export as export
    from petune.serving.hub_pull import Pulled as Pulled, pull as pull
    from petune.serving.hub_push import Pushed as Pushed, push as push
    from petune.serving.predict import Predictor as Predictor, predict as predict
    from petune.serving.predictions import Prediction as Prediction
    from petune.sites.find import find_sites as find_sites
    from petune.sites.input_spec import Inputs as Inputs, InputSpec as InputSpec
    from petune.sites.site import Block as Block, Site as Site, Tower as Tower
    from petune.sites.sites import Sites as Sites
    from petune.training.config import TrainConfig as TrainConfig
    from petune.training.dense_head import DenseHead as DenseHead, add_dense_head as add_dense_head
    from petune.training.events import EpochEnded as EpochEnded, Note as Note, StepDone as StepDone
    from petune.training.meter import Meter as Meter, TorchMeter as TorchMeter
    from petune.training.task import Task as Task, TaskConfig as TaskConfig
    from petune.training.task_registry import list_tasks as list_tasks

__version__ = "0.1.0"

_PUBLIC = {
    "backbones.clips": "take_clips",
    "backbones.names": "list_backbones",
    "base.errors": "AlreadyCompiled AttachError BackboneMismatch CheckpointError ConfigError ContractViolation "
    "DataError DeadSite Diverged ExportError HubError MissingExtra NotMergeable PetuneError PluginError "
    "ProcessLost SiteNotFound Stopped UnknownName UsageError WeightsUnavailable",
    "base.metric": "Metric SplitMetrics",
    "base.plugins": "PluginRecord",
    "data.dataset": "Dataset Split",
    "data.load": "load_dataset",
    "data.reader": "DatasetReader LabeledFiles ReadContext ReaderConfig",
    "data.registry": "DatasetRecord list_datasets",
    "data.target": "Target",
    "injector.attach": "attach",
    "injector.attachment": "Attachment",
    "injector.attention": "Attention",
    "injector.calibration": "CalibrationBatch",
    "injector.counts": "Counts",
    "injector.edit": "Edit",
    "injector.load": "load",
    "injector.peft_type": "PetuneConfig register_with_peft",
    "injector.registry": "list_tuners",
    "injector.sparse": "SparseParameters",
    "injector.token_grid": "TokenGrid",
    "injector.tuner": "Recipe Tuner TunerConfig",
    "plugin_dev.contract": "check_tuner",
    "plugin_dev.dataset_contract": "check_dataset",
    "plugin_dev.task_contract": "check_task",
    "runner.compare": "compare",
    "runner.compare_config": "CompareConfig",
    "runner.comparison": "Comparison",
    "runner.cross_validate": "CrossValidation cross_validate",
    "runner.events": "RunEvent RunStarted",
    "runner.executors": "run_all",
    "runner.grid": "Grid compare_datasets",
    "runner.pretrain": "PretrainConfig pretrain",
    "runner.result": "RunResult",
    "runner.run": "run",
    "runner.run_config": "RunConfig",
    "runner.sweep.search": "sweep",
    "runner.sweep.sweep_config": "SweepConfig",
    "runner.sweep.trials": "Sweep",
    "serving.adapter_bank": "AdapterBank",
    "serving.average": "Averaged AveragedFrom average_adapters",
    "serving.convert": "Converted convert",
    "serving.evaluation": "Evaluation evaluate",
    "serving.export": "Exported export",
    "serving.predict": "Predictor predict",
    "serving.predictions": "Prediction",
    "serving.hub_pull": "Pulled pull",
    "serving.hub_push": "Pushed push",
    "sites.find": "find_sites",
    "sites.input_spec": "Inputs InputSpec",
    "sites.site": "Block Site Tower",
    "sites.sites": "Sites",
    "training.config": "TrainConfig",
    "training.dense_head": "DenseHead add_dense_head",
    "training.events": "EpochEnded Note StepDone",
    "training.meter": "Meter TorchMeter",
    "training.task": "Task TaskConfig",
    "training.task_registry": "list_tasks",
}
"""Public names by the module that defines them. The imports above say the same to type checkers and editors."""

_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'petune' has no attribute {name!r}")
    return getattr(import_module(f"petune.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
