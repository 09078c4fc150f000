"""Export a trained model for use without petune: a torch.export program, ONNX, or the backbone's own weights."""

from petune.serving.export.export_run import FORMATS, Exported, ExportFormat, export

__all__ = ["FORMATS", "ExportFormat", "Exported", "export"]
