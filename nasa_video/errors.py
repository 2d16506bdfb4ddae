"""The exception tree: everything that a person can cause and mend."""


class NasaVideoError(Exception):
    """Base of the errors that the command line prints as one message and turns into a non-zero exit status."""


class InputError(NasaVideoError, ValueError):
    """Something that was given cannot be used; the message says the rule, the value and the way out."""


class OutputError(NasaVideoError):
    """The result could not be written; the message says what was kept and where."""
