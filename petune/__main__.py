"""`python -m petune` is `petune`."""

from petune.cli.main import main

if __name__ == "__main__":
    main()
