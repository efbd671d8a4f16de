"""The program `cs336-basics`, or `python -m cs336_basics`."""

from cs336_basics.machine import share_cores


def main() -> None:
    """Run the command line."""
    share_cores()
    from cs336_basics import cli  # and with it torch, whose threads share_cores is about

    cli.main()


if __name__ == "__main__":
    main()
