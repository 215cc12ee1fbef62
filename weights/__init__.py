import model  # noqa: F401  first, as its last lines import what is here
