"""Values of each test image in a run directory: right or wrong, its error, its loss.

Two runs with the same test split can be compared image by image, which tells a difference from chance.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petune.base.files import replace_file
from petune.runner.file_names import TEST_VALUES

Values = Mapping[str, NDArray[np.float32]]
"""By the name of the metric that their mean is, (N,) in the order of the test split."""


def write_test_values(run_dir: Path, values: Values) -> None:
    """Write the values of a finished run.

    Raises:
        CheckpointError: They cannot be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **values)  # type: ignore[arg-type]
    replace_file(run_dir / TEST_VALUES, buffer.getvalue())


def read_test_values(run_dir: Path) -> Values:
    """Return the values of a run; empty if an older version made it, or the file is damaged."""
    try:
        content = io.BytesIO((run_dir / TEST_VALUES).read_bytes())
        with np.load(content, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
