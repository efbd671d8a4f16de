"""The program `cs336-systems`, also run as `python -m cs336_systems`."""

from cs336_basics.machine import share_cores


def main() -> None:
    """Run the command line."""
    share_cores()
    from cs336_systems import cli  # only now: its commands import torch, whose threads `share_cores` configures

    cli.main()


if __name__ == "__main__":
    main()
