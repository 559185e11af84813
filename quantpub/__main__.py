"""`python -m quantpub` is the command line too: torchrun starts it so, once for each GPU."""

from quantpub.cli import main

if __name__ == "__main__":
    main()
