"""Numbers that one flag takes as `1,2,4`."""


def comma_separated(flag: str, text: str) -> tuple[int, ...]:
    """The numbers in `text`, each once; raises ValueError that names `flag` unless all are at least 1."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--{flag} takes numbers and commas, such as 64,128; got {text!r}") from None
    if min(numbers) < 1:
        raise ValueError(f"--{flag} must be at least 1, got {min(numbers)}")
    return numbers
