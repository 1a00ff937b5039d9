"""The audit: a verdict on every node of a graph, and the certificate that is made of them."""
