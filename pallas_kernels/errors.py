"""The one error type of the project: its message is one line that says what was wrong and what to do."""


class W4A8Error(ValueError):
    """A mistake in the input: the message names the tensor, file or option, what was expected and what was found."""
