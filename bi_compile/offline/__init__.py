"""Ascend without an NPU: stand-ins for CANN's libraries, and models traced on them."""
