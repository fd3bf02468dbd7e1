"""`python -m gpt4fast` is the command `gpt4fast`."""

from gpt4fast.cli import main

if __name__ == "__main__":
    main()
