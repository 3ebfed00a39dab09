"""One finding of a check-up, and what every check needs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Line:
    """What was looked at, whether it is well (None: could not be asked of this model), the figure, and the fix."""

    name: str
    passed: bool | None
    figure: str
    fix: str = ""

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "n/a "}[self.passed]
        return f"{word}  {self.name}: {self.figure}" + (f"; {self.fix}" if self.passed is False else "")
