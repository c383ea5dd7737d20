"""The generated part of the documentation's site: components, papers, the public names."""
