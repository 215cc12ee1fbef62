import model  # noqa: F401, I001
import lora  # noqa: F401  both first, as their last lines import what is here; model before what reads weights
