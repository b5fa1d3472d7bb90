"""The error of settings, apart from them, because commands import it and few read settings."""


class SettingsError(ValueError):
    """Environment variables that cannot be used.

    Attributes:
        lines: for each variable its name, its value and what is accepted.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines
