"""SmolVLA without LeRobot: a checkpoint folder in, one action in the robot's units out."""

import sys

import numpy as np

import smolvla_fast
from smolvla_fast.smolvla import SmolVLAPolicy, make_pre_post_processors, prepare_observation_for_inference

path = sys.argv[1] if len(sys.argv) > 1 else sys.exit("usage: standalone.py CHECKPOINT_FOLDER")
policy = smolvla_fast.patch(SmolVLAPolicy.from_pretrained(path))
preprocess, postprocess = make_pre_post_processors(policy.config, path)
rng = np.random.default_rng(0)  # instead of cameras and encoders
cameras = [key for key in policy.config.image_features if "empty_camera" not in key]
observation = {key: rng.integers(0, 256, (480, 640, 3), dtype=np.uint8) for key in cameras}
observation["observation.state"] = rng.standard_normal(policy.config.robot_state_feature.shape, np.float32)
batch = preprocess(prepare_observation_for_inference(observation, policy.config.device, "pick up the cube"))
action = postprocess(policy.select_action(batch))
print(action)
