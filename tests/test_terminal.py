"""What a terminal, and a log file in its place, gets to see."""

from __future__ import annotations

from cellop_nb.commands.terminal import Status, clock, table


def test_tables_and_times():
    text = table(["name", "s"], [["a", "1.5"], ["longer", "12.0"]], right=(1,))
    assert text.splitlines() == ["name       s", "------  ----", "a        1.5", "longer  12.0"]
    assert (clock(12.3), clock(125)) == ("12 s", "2 min 05 s")


def test_a_log_file_gets_whole_lines(capsys):
    import time

    with Status("working", every=0.05) as status:
        status.update("half way")
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("working") for line in lines)
    assert lines[-1].endswith("half way")
