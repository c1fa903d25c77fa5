"""`python -m wmtp ...` is the `wmtp` command."""

from wmtp.cli import main

if __name__ == "__main__":
    main()
