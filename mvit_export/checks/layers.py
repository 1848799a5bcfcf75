"""What a saved file computes on the way: every tensor of one run, with the op and the PyTorch module that made it.

Each format keeps the module in its own way: ONNX as metadata of the node, TFLite in the tensor's name, Core ML in the
package's metadata. A file that another program wrote may have no modules; its tensors are read anyway.
"""

from __future__ import annotations

import numpy as np

from mvit_export.artifact import Artifact
from mvit_export.errors import ArtifactError, MvitExportError, first_line
from mvit_export.readers.session import Chains, Intermediate, reader_of


def read_intermediates(artifact: Artifact, array: np.ndarray, chains: Chains) -> list[Intermediate]:
    """Run the file on one input and return all floating tensors in the order in which they are made."""
    read_layers = reader_of(artifact.manifest.format).read_layers
    try:
        return [item for item in read_layers(artifact.model_path, array, chains) if item.tensor.dtype.kind == "f"]
    except MvitExportError:
        raise
    except Exception as error:  # the runtimes' errors have no common type
        reason = first_line(error)
        raise ArtifactError(f"{artifact.model_path} does not expose its intermediate tensors: {reason}") from error
