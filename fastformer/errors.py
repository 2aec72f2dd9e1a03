"""What fastformer raises beyond ValueError and TypeError."""


class BackendError(RuntimeError):
    """A backend that the caller named cannot serve the call; the message says why."""
