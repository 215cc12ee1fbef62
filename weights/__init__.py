import lora  # noqa: F401
import model  # noqa: F401  both first, as their last lines import what is here
