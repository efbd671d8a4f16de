"""The program `cs336-alignment`, or `python -m cs336_alignment`."""

from cs336_alignment.machine import share_cores


def main() -> None:
    """Run the command line."""
    share_cores()
    from cs336_alignment import cli  # and with it torch, whose threads share_cores is about

    cli.main()


if __name__ == "__main__":
    main()
