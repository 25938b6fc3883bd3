"""The command line of the scripts, for all tests."""

import signal
import sys

import pytest

import train_vit


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """cli(script, *arguments) calls the main of a script (a module) in this process, in tmp_path
    -> (exit status, stdout, stderr)."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(train_vit, "STOP", [])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        before = signal.getsignal(signal.SIGINT)
        try:
            status = train_vit.exit_status(script.main)
        except SystemExit as end:                    # --help
            status = end.code
        finally:
            signal.signal(signal.SIGINT, before)
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call
