"""What the cases are marked with."""

import pytest

covers = pytest.mark.covers
patient = pytest.mark.patient
only = pytest.mark.only


def differs(how, *methods):
    return pytest.mark.covers(*methods, result="differs", how=how)


def refused(how, *methods):
    return pytest.mark.covers(*methods, result="refused", how=how)


def difference(got, wanted):
    """How content that was read differs, in one line: pytest would look for it for hours."""
    if got == wanted:
        return None
    both = min(len(got), len(wanted))
    wrong = [at for at in range(both) if got[at] != wanted[at]]
    if not wrong:
        return f"{len(got)} bytes of {len(wanted)}"
    first, last = wrong[0], wrong[-1]
    found = wanted.find(bytes(got[first : first + 32]))
    return (
        f"{len(got)} bytes of {len(wanted)}, {len(wrong)} others, from {first} to {last}; "
        f"what is at {first} should be at {found}"
    )
