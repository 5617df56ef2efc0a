"""The paper's STL10 benchmark: MV-MR beside other self-supervised methods, under one protocol."""
