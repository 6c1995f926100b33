"""robust-prune doctor."""

from __future__ import annotations

from ..console import console
from ..errors import EnvironmentProblem


def doctor() -> None:
    """Check the installation and the hardware, and name repairs. Exit code 3 if something must be repaired."""
    from ..machine.snapshot import doctor_checks, render_doctor

    checks = doctor_checks()
    console.print(render_doctor(checks))
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise EnvironmentProblem(f"{', '.join(failed)}: see the repair above")
