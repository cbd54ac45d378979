"""How trained state was made, as data: the arguments of the call, and the call again where its result has no bytes."""
