"""How many processors there are to share out: `python -m service.cores` prints it, for the Makefile."""

import cybn


def usable_cores():
    """Processors that this process may run on, no more than the control groups' CPU quota pays for."""
    config = cybn.show_config("dicts")
    return min(config["processors"], config["cpu quota"] or config["processors"])


if __name__ == "__main__":
    print(usable_cores())
