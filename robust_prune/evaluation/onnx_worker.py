"""Worker process that runs one ONNX file on batches of images; `onnx_scores` starts it.

ONNX Runtime can be crashed, filled or kept busy for ever by a file; the process that evaluates goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..machine.child import Frame, serve
from ..machine.runtime import first_line, import_onnxruntime, limit_memory


def open_file(path: Path, threads: int) -> tuple[Any, str, list[Any]]:
    """Return a session, the name of its input and the shape of that."""
    ort = import_onnxruntime()
    limit_memory(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Worker threads would otherwise spin between batches and slow down the attack on the torch model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises unrelated classes for an unreadable model
        raise UsageError(f"{path} cannot be read as an ONNX model: {first_line(error)}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise UsageError(f"{path} must take one batch of images, but has {len(inputs)} inputs.")
    return session, inputs[0].name, list(inputs[0].shape)


def main() -> None:
    """Answer ``open``, and ``run``, whose payload are float32 images; memory is limited by what they need."""
    session: Any = None
    name, path = "", Path()

    def answer(request: dict[str, Any], payload: bytes) -> Frame:
        nonlocal session, name, path
        if request["op"] == "open":
            path = Path(request["path"])
            session, name, shape = open_file(path, request["threads"])
            return {"shape": shape}, b""
        images = np.frombuffer(payload, np.float32).reshape(request["shape"])
        limit_memory(path, images.nbytes)
        try:
            found = session.run(None, {name: images})
        except Exception as error:  # onnxruntime raises classes of its own
            raise UsageError(f"{path} does not run on images of {images.shape}: {first_line(error)}") from error
        logits = np.ascontiguousarray(found[0], dtype=np.float32) if found else np.zeros(0, np.float32)
        if logits.ndim != 2 or len(logits) != len(images):
            raise UsageError(f"{path} must return logits [{len(images)}, classes], but gave {logits.shape}.")
        return {"shape": list(logits.shape)}, logits.tobytes()

    serve(answer)


if __name__ == "__main__":
    main()
